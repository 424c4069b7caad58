from tests.quant_core.methods.mpqdm.test_distillation import *
from tests.quant_core.conftest import *
@pytest.mark.parametrize("n",[40])
def test_probe(start,n):
    r=run(start(CONFIG.replaced(iterations=n)))
    print("PROBE",n,r.is_taken,r.loss_after/r.loss_before, flush=True)
