"""ingot's ops as TensorRT plugins, for builder and runtime alike.

`api` is TensorRT itself (whichever of its modules is installed), `flavour` what differs between them, `adapter` one
plugin class for every op, and `launcher` what it runs. Nothing here is imported unless the target is `tensorrt`.
"""
