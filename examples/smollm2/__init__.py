"""SmolLM2-135M, a real pretrained model, as a mixture with one expert a layer. See README.md."""
