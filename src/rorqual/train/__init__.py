"""Training of the nano models: generated data, packing, Muon, pre-training and evaluation."""
