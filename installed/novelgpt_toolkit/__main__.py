"""`python -m novelgpt_toolkit`, by which other launchers start ranks: `torchrun -m novelgpt_toolkit lora …`."""

from novelgpt_toolkit import main

if __name__ == "__main__":
    main()
