"""Computing once: stored base images, features of a frozen prefix, a teacher's logits."""
