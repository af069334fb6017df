"""Feature distillation: the linear map from student to teacher features, its losses, and its checks."""
