"""`python -m sku_vllm.cli`, which is what `accelerate launch -m sku_vllm.cli train …` runs."""

from sku_vllm.cli import main

main()
