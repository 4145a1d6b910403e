from lavit_lm.objectives.lavit.objective import LaVIT

__all__ = ["LaVIT"]
