"""Images on disk and in memory: tar shards, the order samples are read in, and the loader that decodes them."""

import os

# webdataset reads this once, when it is imported: no pickle, no torch.load, no `pipe:` commands.
os.environ["WDS_SECURE"] = "1"
