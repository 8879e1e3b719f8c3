import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a machine that is busy is no failure
settings.load_profile("busy")
