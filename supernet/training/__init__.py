"""Training of supernets and single models: recipe, draws, the loop, and how it survives interruption."""
