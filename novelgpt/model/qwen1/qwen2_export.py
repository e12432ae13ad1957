"""The command under its former name: `novelgpt.export.qwen2`."""

from novelgpt.export.qwen2 import main

if __name__ == "__main__":
    main()
