"""From files on disk to rows: decoding, readers, and the data sets of the pipelines."""

import novelgpt as novelgpt
