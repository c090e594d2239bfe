"""The diffusion process: objectives, random timesteps and samplers for any model (x_t, t, y) -> prediction.

Sources, by the names used in this package (arXiv): DDPM 2006.11239, IDDPM 2102.09672, DDIM 2010.02502, DPM-Solver
2206.00927, DPM-Solver++ 2211.01095, v-prediction 2202.00512, rectified flow 2209.03003, Imagen 2205.11487, Min-SNR
2303.09556, P2 2204.00227, UW 2306.00354, SiT 2401.08740, LightningDiT 2501.01423, contrastive flow matching 2506.05350.
"""

from sdit.diffusion.draws import draw_label_drop
from sdit.diffusion.objective import Objective, build_objective
from sdit.diffusion.samplers import Predict, SamplerSettings, sample, trajectory
from sdit.diffusion.schedule import Schedule, make_schedule

__all__ = [
    "Objective",
    "Predict",
    "SamplerSettings",
    "Schedule",
    "build_objective",
    "draw_label_drop",
    "make_schedule",
    "sample",
    "trajectory",
]
