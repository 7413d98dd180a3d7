"""Training a flow on real input: run folders, the loop, likelihoods and pictures."""

from .config import Config
from .evaluate import Evaluation, evaluate
from .model import Model
from .run import load_model, resume, start

__all__ = ["Config", "Evaluation", "Model", "evaluate", "load_model", "resume", "start"]
