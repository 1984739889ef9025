"""The half of the blueprint language that needs torch: modules made from specs of the closed vocabulary."""
