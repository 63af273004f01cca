"""Does federated segmentation get better, and faster, from a foundation model's student?"""

__version__ = "0.1.0"
