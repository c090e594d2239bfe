"""Files that `sdit export --format diffusers` copies into a folder. They import torch and diffusers, and nothing of sdit."""
