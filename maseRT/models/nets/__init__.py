"""The zoo's networks, one family a module; maseRT.models.zoo lists them."""
