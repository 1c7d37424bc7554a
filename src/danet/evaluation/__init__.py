"""Inference by the published protocols, scores, and the evaluation report."""
