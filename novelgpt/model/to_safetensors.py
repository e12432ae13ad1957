"""The command under its former name: `novelgpt.export.to_safetensors`."""

from novelgpt.export.to_safetensors import main

if __name__ == "__main__":
    main()
