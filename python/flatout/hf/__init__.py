"""flatout in Hugging Face transformers (4.57 and newer).

Importing this registers attn_implementation="flatout" (do it before from_pretrained).

    import flatout.hf
    flatout.hf.patch(model)  # norms, SwiGLU, rope, attention and the loss, in this model alone
    print(flatout.hf.report(model))  # what is active where, and why not
"""

from ._attention import NAME, register
from ._fuse import fuse
from ._kernelize import kernelize
from ._patch import patch, unpatch
from ._report import Report, report

register()
__all__ = ["NAME", "Report", "fuse", "kernelize", "patch", "report", "unpatch"]
