"""Recovery by distillation: what earlier stages of a recipe lost is learned again from the original."""
