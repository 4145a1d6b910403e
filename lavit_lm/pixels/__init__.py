"""Vectors that a language model says -> pixels.

vector_decoder.py, decoder_training.py    Emu: a reader before a PixelDecoder's U-Net; trained on what a model says
conditions.py, stable_diffusion.py        what a diffusion model is conditioned on: the shipped one, one of the Hub
detokenizer.py, tokenizer_training.py, tokenizer_files.py
                                          VL-GPT: vectors to those conditions; trained before the language model
"""
