"""Published weights: their names, their files, and the way into sdit's models and back."""

from sdit.interop.diffusers import read_diffusers_config, read_diffusers_folder
from sdit.interop.flow_weights import FLOW_MODEL, convert_flow_weights
from sdit.interop.moe_names import published_expert_name
from sdit.interop.names import published_names
from sdit.interop.published import fixed_tables, load_published, published_buffers, published_parameters, to_published
from sdit.interop.reading import read_weights
from sdit.interop.safetensors_index import read_safetensors_index
from sdit.interop.weight_files import SUFFIXES, read_published_file, write_published_file

__all__ = [
    "FLOW_MODEL",
    "SUFFIXES",
    "convert_flow_weights",
    "fixed_tables",
    "load_published",
    "published_buffers",
    "published_expert_name",
    "published_names",
    "published_parameters",
    "read_diffusers_config",
    "read_diffusers_folder",
    "read_published_file",
    "read_safetensors_index",
    "read_weights",
    "to_published",
    "write_published_file",
]
