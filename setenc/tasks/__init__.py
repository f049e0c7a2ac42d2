"""Models, losses and data of the tasks that UMBC was published with, one file each."""

from setenc.tasks.clustering import MixtureClustering, MixtureSets, mixture_sets
from setenc.tasks.completion import ImageCompletion, pixel_sets
from setenc.tasks.documents import TokenBagClassifier, micro_f1
from setenc.tasks.instances import BagClassifier, clam_instance_loss, rare_instance_bags

__all__ = [
    "BagClassifier",
    "ImageCompletion",
    "MixtureClustering",
    "MixtureSets",
    "TokenBagClassifier",
    "clam_instance_loss",
    "micro_f1",
    "mixture_sets",
    "pixel_sets",
    "rare_instance_bags",
]
