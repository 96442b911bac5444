"""Encrypted neural networks for one question: is this blood cell leukaemic?

The package holds what training, service and client must agree on: the network after collapse, its bundle on
disk, the preprocessing of an image, the plan of an encrypted evaluation and the engines that carry a plan out.
"""

__version__ = "0.1.0"

DISCLAIMER = "Decision support for research, not a diagnosis: a haematologist must confirm every result."
