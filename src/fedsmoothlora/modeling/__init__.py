"""Pretrained models and their LoRA layers."""
