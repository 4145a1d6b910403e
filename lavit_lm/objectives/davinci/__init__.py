from lavit_lm.objectives.davinci.objective import DaVinci

__all__ = ["DaVinci"]
