"""Checkpoints that do not depend on the layout: fp32 state by parameter name and global expert id, in safetensors shards.

A checkpoint is a folder `images-000000012800` with one `shard-NNNNN.safetensors` per writing rank and `manifest.json`.
The manifest is written last. A shard file holds flat fp32 ranges under keys `KIND/NAME@START`. KIND is `weight`, `ema`
or an optimizer moment. NAME is a parameter or, for a stack of experts, `PARAMETER#EXPERT`. START is the first element
of the range in the flattened tensor. The keys say where each range belongs, so any layout can read the checkpoints of
any other layout.

With `checkpoint.files: node` the shards of a node are stored one after another in `node-NNNNN.shards`. The manifest then lists
each shard with its first byte in the file, and its format is 2. `index.py` defines the index in the manifest, which says where
each range is stored.

`manifest.py` defines the fields of a manifest. Later versions may add fields. `length_images` is the length of the run,
which is fixed when the run starts.

torch.distributed.checkpoint is not used for three reasons. Its index is a pickle, it stores no checksums, and its chunks
are boxes, while a ZeRO partition is a range of the flattened tensor.
"""
