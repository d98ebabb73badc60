"""What the engine computes with, one folder per backend; `EngineModel` chooses one."""
