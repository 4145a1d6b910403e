from lavit_lm.objectives.vlgpt.objective import VLGPT

__all__ = ["VLGPT"]
