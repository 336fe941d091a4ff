"""`python -m poolshare.search.cli`, which is how torchrun starts the verbs."""

from .app import main

if __name__ == "__main__":
    main()
