"""Where trees live and in which precision: devices to move them to, and casts."""

from ._device import Device as Device
from ._device import DeviceError as DeviceError
from ._device import bf16 as bf16
from ._device import cpu_device as cpu_device
from ._device import f16 as f16
from ._device import f32 as f32
from ._device import f64 as f64
from ._device import get_device as get_device
from ._device import gpu_device as gpu_device
from ._device import to_device as to_device
from ._iterator import DeviceIterator as DeviceIterator
