"""The torch modules that are exported: UNets with a phase fixed, ControlNets, text encoders and VAEs."""
