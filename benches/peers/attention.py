#!/usr/bin/env python3
"""How long PyTorch's attention takes at FLUX.1-dev's shape, 24 heads of 4,608 tokens and 128 values in bf16, by each backend:
beside what the test `cuda_models` (`nn::cuda_nn_attention`) prints of ours. Milliseconds, as the median of 20 calls of 10."""
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

q, k, v = (torch.randn(1, 24, 4608, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
    with sdpa_kernel(backend):
        for _ in range(5):
            scaled_dot_product_attention(q, k, v)
        times = []
        for _ in range(20):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(10):
                scaled_dot_product_attention(q, k, v)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 10)
    print(f"PyTorch {torch.__version__}, {name}: {statistics.median(times):.3f} ms")
