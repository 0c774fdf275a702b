"""Other packages' attention calls, computed by triflash: one module for each package. Nothing here is imported until it is asked for.

``triflash.compat.sdpa``        ``torch.nn.functional.scaled_dot_product_attention``
``triflash.compat.flash_attn``  FlashAttention-2's Python functions
``triflash.compat.xformers``    ``xformers.ops.memory_efficient_attention``

docs/migration.md says what differs.
"""
