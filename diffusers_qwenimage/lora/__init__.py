"""LoRA files: read any format, prove what was read, write any format. Pure functions on state dicts.

    from diffusers_qwenimage.lora.convert import convert_lora
    convert_lora("style.safetensors", "style_comfy.safetensors", "opensource")

architectures   the modules of each model and their sizes          updates     one weight change, its tensors
and scale formats         how each tool spells its keys                      read        file -> updates, with
everything checked grouping        tensors of a module -> kind and completeness       scales      where the
scale of an update is found targets         what can be written, and what a target refuses     render
updates -> names, scales and metadata factors         exact folding and expansion                        fused
q, k and v as one module, and back approximate     the nearest low-rank factors                       metadata
what stays true after a conversion write           one tensor at a time
provenance  the way back, byte by byte convert         files: rendered, written, read back, proved
verify      equality of weight changes, in fp64 report          what a file holds, as data and text
"""
