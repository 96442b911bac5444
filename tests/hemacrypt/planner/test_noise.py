"""The predicted noise of every primitive against what SEAL makes; rotations, squares and fresh ciphertexts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import tenseal.sealapi as seal

from hemacrypt.engines.clear import ckks as clear
from hemacrypt.plan.plan import LinearStep, Parameters, SquareStep
from hemacrypt.planner import noise
from hemacrypt.planner.chain import choose_parameters
from hemacrypt.seal import io as sealio
from hemacrypt.seal.io import SealObject
from tests.hemacrypt.setups import Setup

Slots = npt.NDArray[np.float64]
Complex = npt.NDArray[np.complex128]
SCALE = 2.0**36
TRIALS = 3


@dataclass
class Bench:
    """SEAL's objects at the parameters of the cell network."""

    parameters: Parameters
    context: sealio.Context
    encoder: SealObject
    evaluator: SealObject
    generator: SealObject
    encryptor: SealObject
    decryptor: SealObject
    galois: SealObject
    relinearisation: SealObject
    model: noise.NoiseModel

    def encrypt(self, values: Slots | Complex, scale: float = SCALE) -> SealObject:
        plain = seal.Plaintext()
        self.encoder.encode(values.tolist(), scale, plain)
        return sealio.load(seal.Ciphertext(), self.context, sealio.dump(self.encryptor.encrypt_symmetric(plain)))

    def decrypt(self, ciphertext: SealObject) -> Slots:
        plain = seal.Plaintext()
        self.decryptor.decrypt(ciphertext, plain)
        return np.array(self.encoder.decode_double(plain))

    def decrypt_complex(self, ciphertext: SealObject) -> Complex:
        plain = seal.Plaintext()
        self.decryptor.decrypt(ciphertext, plain)
        return np.array(self.encoder.decode_complex(plain))

    def conjugate(self, ciphertext: SealObject) -> SealObject:
        turned = seal.Ciphertext()
        self.evaluator.apply_galois(ciphertext, CONJUGATION, self.galois, turned)
        return turned

    def rotate(self, ciphertext: SealObject, step: int) -> SealObject:
        turned = seal.Ciphertext()
        self.evaluator.rotate_vector(ciphertext, step, self.galois, turned)
        return turned


STEPS = tuple(1 << power for power in range(12))
CONJUGATION = 2 * 8192 - 1


def make_bench() -> Bench:
    parameters = choose_parameters(8192, 2)
    context = sealio.make_context(parameters)
    generator = seal.KeyGenerator(context)
    galois, relinearisation = seal.GaloisKeys(), seal.RelinKeys()
    generator.create_galois_keys([*(parameters.galois_element(step) for step in STEPS), CONJUGATION], galois)
    generator.create_relin_keys(relinearisation)
    secret = generator.secret_key()
    return Bench(
        parameters,
        context,
        seal.CKKSEncoder(context),
        seal.Evaluator(context),
        generator,
        seal.Encryptor(context, secret),
        seal.Decryptor(context, secret),
        galois,
        relinearisation,
        noise.NoiseModel(parameters),
    )


@pytest.fixture(scope="module")
def bench() -> Bench:
    return make_bench()


def normalised_rms(errors: list[Slots], variance: Slots | float) -> float:
    """Return measured over predicted standard deviation, every slot weighing the same."""
    return float(np.sqrt(np.mean([error**2 / variance for error in errors])))


def report(name: str, ratio: float) -> None:
    print(f"{name}: measured / predicted {ratio:.4f}")
    assert 1 / 1.2 < ratio < 1.2


def values(seed: int) -> Slots:
    return np.random.default_rng(seed).uniform(-1, 1, 4096)


def test_a_fresh_ciphertext_has_the_predicted_noise(bench: Bench) -> None:
    scale = 2.0**30
    errors = [bench.decrypt(bench.encrypt(values(seed), scale)) - values(seed) for seed in range(TRIALS)]
    predicted = (bench.model.fresh + bench.model.encoding) / scale**2
    report("fresh", normalised_rms(errors, predicted))


def test_encoding_alone_has_the_predicted_noise(bench: Bench) -> None:
    errors = []
    for seed in range(TRIALS):
        plain = seal.Plaintext()
        bench.encoder.encode(values(seed).tolist(), 2.0**20, plain)
        errors.append(np.array(bench.encoder.decode_double(plain)) - values(seed))
    report("encoding", normalised_rms(errors, bench.model.encoding / 2.0**40))


def test_a_rotated_ciphertext_has_the_predicted_noise(bench: Bench) -> None:
    errors = []
    for seed, step in enumerate(STEPS):
        content = values(seed)
        errors.append(bench.decrypt(bench.rotate(bench.encrypt(content), step)) - np.roll(content, -step))
    predicted = (bench.model.fresh + bench.model.encoding + bench.model.key_switch(5)) / SCALE**2
    report("rotated", normalised_rms(errors, predicted))


@pytest.mark.parametrize("level", [5, 3, 1])
def test_a_key_switch_alone_has_the_predicted_noise_at_every_level(bench: Bench, level: int) -> None:
    errors = []
    for seed, step in enumerate(STEPS):
        ciphertext = bench.encrypt(values(seed), 2.0**30)
        words = sealio.parms_id_words(bench.parameters.parms_id(level))
        bench.evaluator.mod_switch_to_inplace(ciphertext, words)
        before = bench.decrypt(ciphertext)
        errors.append(bench.decrypt(bench.rotate(ciphertext, step)) - np.roll(before, -step))
    predicted = bench.model.key_switch(level) / 2.0**60
    report(f"key switch at level {level}", normalised_rms(errors, predicted))


def test_slots_with_roots_near_one_have_far_more_key_switch_noise(bench: Bench) -> None:
    """SEAL's digits are not centred; their mean shows in slot 0, whose root is next to 1."""
    errors = []
    # A slot's noise is nearly constant for one key (its errors times the digits' mean), so many keys are needed.
    for round_number in range(4):
        subject = bench if round_number == 0 else make_bench()
        for seed, step in enumerate(STEPS):
            ciphertext = subject.encrypt(values(seed))
            before = subject.decrypt(ciphertext)
            errors.append(subject.decrypt(subject.rotate(ciphertext, step)) - np.roll(before, -step))
    measured = np.sqrt(np.mean(np.square(errors), axis=0))
    predicted = np.sqrt(bench.model.key_switch(5)) / SCALE
    ratio = float(measured[0] / np.median(measured))
    print(f"slot 0 over median slot: measured {ratio:.1f}, predicted {predicted[0] / np.median(predicted):.1f}")
    print(f"slot 0: measured / predicted {measured[0] / predicted[0]:.3f}")
    assert ratio > 10
    # 48 keys: a factor of two is some ten standard deviations away.
    assert 0.5 < measured[0] / predicted[0] < 2
    assert int(np.argmax(predicted)) == 0


def test_a_square_has_the_predicted_noise(bench: Bench) -> None:
    step = SquareStep(5, 1, "plain", SCALE, SCALE**2 / bench.parameters.data_primes[5])
    errors, ratios = [], []
    for seed in range(TRIALS):
        content = values(seed)
        ciphertext = bench.encrypt(content)
        bench.evaluator.square_inplace(ciphertext)
        bench.evaluator.relinearize_inplace(ciphertext, bench.relinearisation)
        bench.evaluator.rescale_to_next_inplace(ciphertext)
        assert ciphertext.scale == pytest.approx(step.output_scale, rel=1e-12)
        errors.append(bench.decrypt(ciphertext) - content**2)
        fresh = np.full(4096, (bench.model.fresh + bench.model.encoding) / SCALE**2)
        ratios.append(errors[-1] ** 2 / noise.square_error(bench.model, step, fresh[None], np.abs(content)[None]))
    report("square, relinearised, rescaled", float(np.sqrt(np.mean(ratios))))


def complex_values(seed: int) -> Complex:
    return values(seed) + 1j * values(seed + 1000)


def test_a_conjugation_has_the_noise_of_a_rotation_in_both_parts(bench: Bench) -> None:
    real, imaginary = [], []
    for seed in range(6):
        # A key's errors are nearly constant in a slot, so that the keys should be several as well.
        subject = bench if seed < 3 else make_bench()
        content = complex_values(seed)
        ciphertext = subject.encrypt(content)
        error = subject.decrypt_complex(subject.conjugate(ciphertext)) - subject.decrypt_complex(ciphertext).conj()
        real.append(error.real)
        imaginary.append(error.imag)
    predicted = bench.model.key_switch(5) / SCALE**2
    report("conjugation, real parts", normalised_rms(real, predicted))
    report("conjugation, imaginary parts", normalised_rms(imaginary, predicted))


def test_parting_adds_half_the_noise_of_a_conjugation_to_either_part(bench: Bench) -> None:
    """The value plus its conjugate is twice the real part: in the part's own units the key switch weighs half."""
    errors = []
    for seed in range(TRIALS):
        content = complex_values(seed)
        ciphertext, real, other = bench.encrypt(content), seal.Ciphertext(), seal.Ciphertext()
        conjugated, before = bench.conjugate(ciphertext), bench.decrypt_complex(ciphertext)
        bench.evaluator.add(ciphertext, conjugated, real)
        bench.evaluator.sub(ciphertext, conjugated, other)
        errors.append(bench.decrypt_complex(real).real / 2 - before.real)
        errors.append(bench.decrypt_complex(other).imag / 2 - before.imag)
    report("parting", normalised_rms(errors, bench.model.key_switch(5) / (2 * SCALE) ** 2))


@pytest.mark.parametrize(("name", "kind"), [("pair", "parted"), ("spread", "joined")])
def test_a_square_of_complex_slots_has_the_predicted_noise(
    name: str, kind: str, request: pytest.FixtureRequest
) -> None:
    """The engine's square on ciphertexts that SEAL encrypted at its level; real and imaginary part alike."""
    setup: Setup = request.getfixturevalue(name)
    step, parameters = setup.plan.steps[1], setup.plan.parameters
    assert isinstance(step, SquareStep)
    assert step.kind == kind
    model, context = noise.NoiseModel(parameters), sealio.make_context(parameters)
    encoder, words = seal.CKKSEncoder(context), sealio.parms_id_words(parameters.parms_id(step.level))
    encryptor = seal.Encryptor(context, sealio.load(seal.SecretKey(), context, setup.holder.secret_bytes()))
    measured: list[Slots] = []
    bounded: list[Slots] = []
    for seed in range(2 * TRIALS):
        content = np.stack([complex_values(10 * seed + number) for number in range(step.inputs)])
        if kind == "joined":
            content.imag = 0
        values, plain = [], seal.Plaintext()
        for row in content:
            encoder.encode(row.tolist(), words, step.input_scale, plain)
            written = sealio.dump(encryptor.encrypt_symmetric(plain))
            values.append(sealio.load(seal.Ciphertext(), context, written))
        error = decrypted(setup, setup.engine._square(step, values, setup.keys)) - clear.square(step, content)
        fresh = np.full(content.shape, (model.fresh + model.encoding / 2) / step.input_scale**2)
        parts: tuple[noise.Part, noise.Part] = ("real", "imaginary")
        predicted = [noise.square_error(model, step, fresh, content, part) for part in parts]
        added = noise.square_error(model, step, np.zeros_like(fresh), np.zeros(content.shape))
        if kind == "joined":
            # Fresh errors are complex: either part takes those of both ciphertexts.
            exact = [4 * (content.real**2 * fresh)[::2] + 8 * (content.real**2 * fresh)[1::2] + added] * 2
        else:
            # A conjugation's own error is complex; what was there before stays with its part.
            switch = model.key_switch(step.level) / (2 * step.input_scale) ** 2
            exact = [
                4 * content.real**2 * (fresh + switch) + 8 * content.imag**2 * switch + added,
                4 * content.real**2 * switch + 8 * content.imag**2 * (fresh + switch) + added,
            ]
        for part, variance, bound in zip((error.real, error.imag), exact, predicted, strict=True):
            measured.append(part**2 / variance)
            bounded.append(part**2 / bound)
    report(f"{kind} square, real parts", float(np.sqrt(np.mean(measured[::2]))))
    report(f"{kind} square, imaginary parts", float(np.sqrt(np.mean(measured[1::2]))))
    assert 0.4 < np.sqrt(np.mean(bounded)) < 1.2


def test_a_rescale_has_the_predicted_noise(bench: Bench) -> None:
    errors = []
    for seed in range(TRIALS):
        ciphertext = bench.encrypt(values(seed), 2.0**50)
        before = bench.decrypt(ciphertext)
        bench.evaluator.rescale_to_next_inplace(ciphertext)
        errors.append(bench.decrypt(ciphertext) - before)
    scale = 2.0**50 / bench.parameters.data_primes[5]
    report("rescale", normalised_rms(errors, bench.model.rescale / scale**2))


def decrypted(setup: Setup, values: list[SealObject]) -> Complex:
    """Return the slots of SEAL's ciphertexts, at whatever level they are, shape (ciphertexts, slots)."""
    context = sealio.make_context(setup.plan.parameters)
    decryptor = seal.Decryptor(context, sealio.load(seal.SecretKey(), context, setup.holder.secret_bytes()))
    rows = []
    for value in values:
        plain = seal.Plaintext()
        decryptor.decrypt(value, plain)
        rows.append(seal.CKKSEncoder(context).decode_complex(plain))
    return np.array(rows)


def fresh_values(setup: Setup, images: npt.ArrayLike) -> tuple[list[SealObject], Complex, Slots]:
    """Encrypt; return SEAL's ciphertexts, the slots in the clear and the predicted error variance of the latter."""
    public, model = setup.plan.public, noise.NoiseModel(setup.plan.parameters)
    context = sealio.make_context(public.parameters)
    content = public.input_layout.pack(images)
    uploads = [setup.checked(upload) for upload in setup.holder.encrypt(images)]
    values = [sealio.load(seal.Ciphertext(), context, upload) for upload in uploads]
    return values, content, np.full(content.shape, (model.fresh + model.encoding) / public.input_scale**2)


@pytest.mark.parametrize("name", ["cell", "one_square", "pair", "spread", "large_image"])
def test_an_affine_map_has_the_predicted_noise(name: str, request: pytest.FixtureRequest) -> None:
    """The first layer by the engine, slot by slot against the predicted variance."""
    setup: Setup = request.getfixturevalue(name)
    step, public, engine = setup.plan.steps[0], setup.plan.public, setup.engine
    assert isinstance(step, LinearStep)
    model = noise.NoiseModel(setup.plan.parameters)
    ratios = []
    for seed in range(TRIALS):
        images = np.random.default_rng(seed).random((public.images, *setup.network.input_shape))
        values, content, fresh = fresh_values(setup, images)
        found = decrypted(setup, engine._linear(step, engine._encoded[0], values, setup.keys))
        error = found - clear.linear(step, content)
        predicted = noise.linear_error(model, step, fresh, np.abs(content)) + noise.rescale_error(model, step)
        ratios.append(error.real**2 / predicted)
    report(f"first layer of {name}", float(np.sqrt(np.mean(ratios))))


def test_the_predicted_bound_is_no_idle_promise(cell: Setup) -> None:
    """Errors of whole evaluations: below the bound, yet not so far that the bound says nothing."""
    rng = np.random.default_rng(8)
    # The largest error of few evaluations now and then is a tenth of the usual one.
    images = rng.random((24, 3, 32, 32))
    errors = np.concatenate([cell.predict(image) for image in images]) - cell.network(images)
    ratio = float(np.abs(errors).max() / cell.plan.public.logit_error_bound)
    print(f"largest logit error over bound: {ratio:.4f}")
    assert 1 / 100 < ratio < 1


@pytest.mark.parametrize("name", ["cell", "regression"])
def test_copies_of_a_logit_may_differ_as_far_as_rounding_takes_them(name: str, request: pytest.FixtureRequest) -> None:
    """Rounding times the secret is Laplace in a slot: exp(-sqrt(2) k) of all slots lie beyond k standard deviations.

    Of 4096 slots one in 10^8 replies has one beyond 18; beyond 8 it is one reply in thirty.
    """
    setup: Setup = request.getfixturevalue(name)
    rounding = np.sqrt(noise.NoiseModel(setup.plan.parameters).rescale) / setup.plan.public.output_scale
    assert setup.plan.public.copy_tolerance >= 18 * rounding
    layout = setup.plan.public.output_layout
    fourth, second = [], []
    used = layout.pack(np.ones(layout.positions.size)) != 0
    for _ in range(3):
        slots = setup.slots(setup.reply(np.full(setup.network.inputs, 0.5))).real
        error = (slots - layout.pack(layout.unpack(slots)).real)[used]
        fourth.append(np.mean(error**4))
        second.append(np.mean(error**2))
    print(f"rounding: measured / predicted {np.sqrt(np.mean(second)) / rounding:.3f}")
    # A Gaussian has 3, a Laplace distribution 6.
    assert np.mean(fourth) / np.mean(second) ** 2 > 3.5
