"""The figures of a cluster that predicted times use, read from a hardware file and checked like a config. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sdit.config import describe_error, dump_yaml, read_yaml
from sdit.errors import ConfigError

RESERVE_GIB = 2.0  # of a device's memory, for context, libraries and fragmentation
Width = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Part(BaseModel):
    """A frozen section of a hardware file. It refuses unknown keys, infinite numbers and silent type conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def figure(text: str, **bounds: float) -> float:
    """Return a required field: a number with its unit and meaning."""
    return Field(description=text, **bounds)  # type: ignore[no-any-return, call-overload]


class Device(Part):
    """One GPU, or the cores of one rank."""

    fp32_teraflops: float = figure("10^12 FLOP/s of fp32 matrix products", gt=0)
    bf16_teraflops: float = figure("10^12 FLOP/s of bf16 matrix products", gt=0)
    mfu: dict[Width, Fraction] = Field(
        description="width of the model -> model FLOPs of forward and backward passes over the FLOP/s above",
        min_length=1,
    )
    kind: Literal["cuda", "cpu"] = Field(
        description="a cpu does not compute while it sends data, and has no fused AdamW"
    )
    memory_gib: float = figure("GiB of device memory", gt=0)
    memory_gigabytes_per_second: float = figure("10^9 bytes/s of device memory", gt=0)
    host_copy_gigabytes_per_second: float = figure("10^9 bytes/s of one rank's copies to host memory", gt=0)

    @field_validator("mfu", mode="before")
    @classmethod
    def _widths_are_numbers(cls, value: object) -> object:
        """Convert the keys, which are text in YAML."""
        if not isinstance(value, dict):
            return value
        return {int(key) if isinstance(key, str) and key.isdecimal() else key: mfu for key, mfu in value.items()}


class Collective(Part):
    """One collective operation on one link."""

    gigabytes_per_second: float = figure("10^9 bytes/s that one rank sends", gt=0)
    fixed_microseconds: float = figure(
        "10^-6 s that an operation without data adds to two ranks which compute before it", ge=0
    )


class Link(Part):
    """The network of ranks of one node, or of different nodes."""

    all_to_all: Collective
    all_reduce: Collective
    all_gather: Collective


class Storage(Part):
    """The file system that holds checkpoints."""

    node_gigabytes_per_second: float = figure("10^9 bytes/s that one node reads or writes", gt=0)
    total_gigabytes_per_second: float = figure("10^9 bytes/s of all nodes together", gt=0)


class Host(Part):
    """Work of the host that the device waits for, and restarts."""

    step_milliseconds: float = figure("10^-3 s of a step on one rank", ge=0)
    step_microseconds_per_rank: float = figure("10^-6 s of a step for each rank of the run", ge=0)
    restart_seconds: float = figure("s from a failure to training, without reading the checkpoint", ge=0)


class Hardware(Part):
    """A hardware file. `sources` name where its figures are from, a line each."""

    name: str = Field(min_length=1)
    sources: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
    device: Device
    inside: Link = Field(description="between ranks of a node")
    between: Link = Field(description="between ranks of different nodes")
    storage: Storage
    host: Host
    node_mtbf_hours: float = figure("mean hours between failures of one node", gt=0)
    price_per_device_hour: float | None = Field(
        None, description="price of one device for an hour; null: unknown", ge=0
    )

    @field_validator("sources")
    @classmethod
    def _sources_differ(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("holds a source twice; legal: each once")
        return value


def read_hardware(path: str | Path) -> Hardware:
    """Return the hardware of a file.

    Raises: ConfigError: if it is unreadable, a key is unknown or missing, or a value is not legal.
    """
    try:
        return Hardware.model_validate(read_yaml(Path(path)))
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":
            raise ConfigError(f"{path}: {'.'.join(map(str, first['loc']))}: is missing; legal: a value") from None
        raise ConfigError(f"{path}: {describe_error(error, Hardware)}") from None


def write_hardware(hardware: Hardware) -> str:
    """Return the text of a hardware file. `read_hardware` reads it back to an equal object."""
    return dump_yaml(hardware.model_dump(mode="json"))
