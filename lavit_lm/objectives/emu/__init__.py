from lavit_lm.objectives.emu.objective import Emu

__all__ = ["Emu"]
