"""Published weights: their names, their files, and the way into sdit's models and back."""

from sdit.interop.flow_weights import FLOW_MODEL, convert_flow_weights
from sdit.interop.names import published_names
from sdit.interop.published import fixed_tables, load_published, published_buffers, to_published
from sdit.interop.weight_files import SUFFIXES, read_published_file, write_published_file

__all__ = [
    "FLOW_MODEL",
    "SUFFIXES",
    "convert_flow_weights",
    "fixed_tables",
    "load_published",
    "published_buffers",
    "published_names",
    "read_published_file",
    "to_published",
    "write_published_file",
]
