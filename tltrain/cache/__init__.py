"""Caches of what does not change during a run: base images, features of frozen blocks, a teacher's logits."""
