"""The tuners of all methods, registered with PEFT. Whoever may be importing one of them already goes on."""

import lorma.methods.bottleneck.tuner
import lorma.methods.lorma.tuner
import lorma.methods.peft_kinds
import lorma.methods.svft.tuner
import lorma.methods.tlora.tuner  # noqa: F401
