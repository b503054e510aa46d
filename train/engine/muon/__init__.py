"""Muon: orthogonalised updates of matrices that ZeRO has cut over ranks."""
