"""Small models run slower on several threads than on one, and side by side they would fight for cores."""

import torch

torch.set_num_threads(1)
