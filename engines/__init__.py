"""A graph becomes something that runs; importing this turns off what OpenVINO would tell Google Analytics."""

import sys

# As if the package were not installed, which OpenVINO and NNCF allow for. Theirs sends an event when OpenVINO is
# imported, from a process that it forks, and has no setting of a program's own.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
