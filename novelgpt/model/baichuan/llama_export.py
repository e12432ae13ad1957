"""The command under its former name: `novelgpt.export.llama`."""

from novelgpt.export.llama import main

if __name__ == "__main__":
    main()
