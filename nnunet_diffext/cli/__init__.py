"""The command ``nnunet_diffext``: one module per verb, imported only when the verb is used."""
