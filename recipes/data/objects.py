"""Objects that images are composed of: their names, and which captions mean them.

"red apple" (an emoji), "another apple, fruit, food" (a clip art)  ->  "apple"
"""

from __future__ import annotations

import re

JUDGED = (
    "t-shirt", "trousers", "dress", "sandal", "sneaker", "bag", "ankle boot", "star", "heart",
    "apple", "pear", "flower", "house", "book", "fish", "mushroom", "guitar", "umbrella", "key",
    "butterfly",
)  # fmt: skip
"""The twenty that benchmarks/binding.py distinguishes; composed more often than the others."""
NAMES = """
t-shirt=t shirt or top,t shirt,tshirt; trousers=jeans; pullover; dress; coat; shirt; ankle boot
sandal=womans sandal; sneaker=athletic shoe,running shoe; bag=handbag,purse
hat=top hat,hat clothing
star=stars,medium star,glowing star; heart=heart highlight,heavy heart; circle; square; diamond
arrow=arrow left,arrow right,arrow up,arrow down; flower=flower peterm; rose; tulip; sunflower
daffodil; daisy; cactus; leaf=maple leaf,fallen leaf; tree=deciduous tree,evergreen tree; mushroom
palm tree; christmas tree; apple; pear; lemon; banana; strawberry; peach; pineapple; grapes=grape
melon; watermelon; mango; tomato; carrot; potato; onion; eggplant=aubergine; cherries; coconut
pumpkin; raspberry; apricot; bread; cheese=cheese wedge; egg; cake=birthday cake; cookie; candy
lollipop; doughnut=donut; muffin; cupcake; hamburger; pizza=slice of pizza; croissant; pretzel
sandwich; pancakes; ice cream=soft ice cream,cone,cone soft vanilla; taco; burrito; mug; teapot
cup; wine glass; fork; spoon; plate; jar; fish=tropical fish; shark; whale; dolphin; crab; octopus
shrimp; lobster; seahorse; jellyfish; bird; owl; duck; eagle; penguin; rooster; chicken; turkey
parrot; flamingo; swan; peacock; seagull; butterfly; bee=honeybee; ladybug=lady beetle; spider
snail; ant; fly; beetle; mosquito; worm; scorpion; bug; cat=gatto cat; dog; horse; cow; pig; sheep
goat; rabbit; elephant; tiger; lion; bear; fox; deer; kangaroo; gorilla; monkey; giraffe; mouse; rat
rhinoceros; hippopotamus; camel; hedgehog; beaver; raccoon; koala; bat; frog; turtle; lizard; snake
dragon; donkey; otter; badger; squirrel; leopard; unicorn; dinosaur=dino
car=automobile,racing car,sedan car,police car; bus
truck=delivery truck,articulated lorry,dump truck
pickup truck; train; tram; bicycle; motorcycle
airplane=small airplane,aircraft; helicopter; rocket
sailboat=sail boat; ship; tractor; ambulance; fire engine=fire truck; anchor; scooter; canoe
guitar=electric guitar,classical guitar; violin; trumpet; saxophone; drum; harp; flute; bell
hammer; wrench; screwdriver; axe; saw=carpentry saw; scissors; key; lock; shield; sword; gear
magnet; shovel; ladder; bucket; broom; basket; pencil; pen; crayon; paintbrush=paint brush; palette
book=closed book,open book; notebook; envelope; clipboard; paperclip; newspaper; folder=file folder
clock=alarm clock; lightbulb=bulb,electric bulb; candle; camera; television=tv
computer; printer; keyboard; telephone=phone; mobile phone; battery; radio; joystick; microphone
crown; ring; scarf; gloves; socks; sunglasses; glasses=eyeglasses; backpack; necktie; bow tie
umbrella=closed umbrella; balloon=baloon; gift=wrapped gift,wrapped present; soccer ball; baseball
american football; basketball; volleyball; trophy; snowman; teddy bear; ghost; skull; flag; tent
chair; bed; couch=sofa; door; toothbrush; cloud; moon=crescent moon; sun; fire; feather; eye; tooth
brain; hand; foot; house=home,houses,house building,house with garden; castle; church; factory
lighthouse; windmill; bridge; robot; puzzle piece; kite; yo yo; boomerang; telescope; microscope
syringe; pill; bandage; shopping cart; suitcase; briefcase; barrel; bone; nest; rainbow; snowflake
"""
ALIASES = {
    alias: name
    for entry in NAMES.strip().replace("\n", ";").split(";")
    if entry.strip()
    for name, _, others in [entry.strip().partition("=")]
    for alias in (name.replace("-", " "), *filter(None, others.split(",")))
}
COLOR_WORDS = {
    "red", "orange", "yellow", "green", "blue", "purple", "violet", "pink", "brown", "black",
    "white", "gray", "grey", "golden", "color", "colour", "colored", "coloured", "colourful", "bw",
    "dark", "light",
}  # fmt: skip
DROPPED = COLOR_WORDS | {
    "a", "an", "the", "photo", "of", "simple", "little", "small", "big", "large", "old", "another",
    "cartoon", "contour", "cute", "alt", "plain", "nice", "huge", "very", "happy", "funny",
}  # fmt: skip
NOT_COUNTED = {
    "trousers", "scissors", "grapes", "cherries", "pancakes", "gloves", "socks", "glasses",
    "sunglasses", "fire", "bread", "cheese",
}  # fmt: skip
PLURALS = {
    "mouse": "mice", "leaf": "leaves", "tooth": "teeth", "foot": "feet", "sheep": "sheep",
    "fish": "fish", "deer": "deer",
}  # fmt: skip
NOT_MIRRORED = {"clock", "book", "newspaper", "keyboard", "computer", "flag", "guitar", "arrow"}
"""Objects with writing, or of another meaning when flipped horizontally."""


def object_of(caption: str) -> str | None:
    """The object that the first part of a caption names; None if it is no object of NAMES."""
    first = caption.lower().split(",")[0]
    words = [word for word in re.findall(r"[a-z]+", first) if word not in DROPPED]
    return ALIASES.get(" ".join(words))


def mentioned(caption: str) -> tuple[set[str], set[str]]:
    """Colors and objects whose names are words of a caption."""
    text = " " + " ".join(re.findall(r"[a-z]+", caption.lower())) + " "
    spelled = {"grey": "gray", "violet": "purple"}
    colors = {spelled.get(word, word) for word in COLOR_WORDS & set(text.split())}
    return colors, {name for alias, name in ALIASES.items() if f" {alias} " in text}


def with_article(phrase: str, name: str) -> str:
    """apple -> "an apple", red apple -> "a red apple", trousers -> "trousers"."""
    if name in NOT_COUNTED:
        return phrase
    vowel = phrase[0] in "aeio" or phrase.startswith("umb")
    return f"{'an' if vowel else 'a'} {phrase}"


def plural(name: str) -> str:
    """bus -> "buses"; of two words, the last."""
    *first, last = name.split(" ")
    if last in PLURALS:
        last = PLURALS[last]
    elif re.search(r"(s|x|ch|sh|tomato|potato|mango|mosquito)$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*first, last])
