"""Checkpoints: a crash-consistent store on chunks, loops that save and go on where they were."""
