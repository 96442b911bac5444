"""From labelled cell images to a model bundle: data sets, training, collapse, export, evaluation.

The only package that imports TensorFlow; importing ``training`` or ``training.cli`` does not.
"""
