"""Improved denoising diffusion probabilistic models (Nichol & Dhariwal, 2021): the model, its losses and its
samplers.

Everything here is a function of tensors: no files but published checkpoints, no processes, no logging.
`pipeline` does those.

The papers the docstrings cite: DDPM (Ho et al. 2020, arXiv:2006.11239), IDDPM (Nichol & Dhariwal 2021,
arXiv:2102.09672) and DDIM (Song et al. 2021, arXiv:2010.02502).
"""

__version__ = "0.1.0"
