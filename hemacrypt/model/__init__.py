"""The network: folding, quantisation, the bundle on disk, preprocessing, calibration of precision."""
