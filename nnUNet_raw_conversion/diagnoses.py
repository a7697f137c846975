"""The diagnosis of a hospital's table, in known words: a cell may also hold names, numbers and dates."""

from __future__ import annotations

import re

from nnUNet_raw_conversion.vocabulary import ALSO_NAMES, LESION, NUMBERED, ORGANS, REGIONS, folded, known_parts


def _words(text: str) -> frozenset[str]:
    return frozenset(form for word in text.split() for form in folded(word))


# Kinds of disease: without one of them a text is no diagnosis
_DISEASES = LESION | _words(
    """
    lymphomas lymphome lymphomen linfomas lymphogranulomatosis lymphogranulomatose hodgkin nhl hl chl nlphl dlbcl dlcl
    fl cll sll mcl mzl malt pmbcl pmbl pcnsl ptld alcl aitl ptcl nktcl bcell tcell myeloma myelom myélome mieloma
    plasmocytoma plasmozytom plasmacytoma plasmacytom leukemia leukaemia leukämie leucémie leucemia aml cml
    waldenström thymoma thymom seminoma seminom nonseminoma nonseminom teratoma dysgerminoma chorionkarzinom
    hypernephroma hypernephrom adenocarcinoma adenokarzinom adénocarcinome adenocarcinom adenoca ca carcinomas
    karzinoms squamous plattenepithelkarzinom bronchialkarzinom mammakarzinom prostatakarzinom kolonkarzinom
    rektumkarzinom ovarialkarzinom zervixkarzinom schilddrüsenkarzinom nierenzellkarzinom pankreaskarzinom
    magenkarzinom ösophaguskarzinom urothelkarzinom larynxkarzinom oropharynxkarzinom hypopharynxkarzinom
    hepatozelluläres cholangiocarcinoma cholangiokarzinom cholangiozelluläres ccc crc hnscc scc gist net nen nec
    neuroendocrine neuroendokriner neuroendokrine neuroendokrines carcinoid karzinoid carcinoïde insulinoma insulinom
    paraganglioma paragangliom phaeochromocytoma pheochromocytoma phäochromozytom pheo neuroblastoma neuroblastom
    nephroblastoma nephroblastom hepatoblastoma retinoblastoma medulloblastoma glioblastoma glioblastom gbm glioma
    gliom astrocytoma astrozytom oligodendroglioma ependymoma meningioma meningeom meningiom schwannoma adenoma adenom
    mesothelioma mesotheliom osteosarcoma osteosarkom liposarcoma liposarkom leiomyosarcoma leiomyosarkom
    rhabdomyosarcoma rhabdomyosarkom angiosarcoma fibrosarcoma myxofibrosarcoma chondrosarcoma synovialsarkom
    ewingsarkom weichteilsarkom weichgewebesarkom sarcomas sarcoidosis sarkoidose sarcoïdose sarcoidosi tuberculosis
    tuberkulose histiocytosis histiozytose mastocytosis amyloidosis amyloidose vasculitis vaskulitis arteritis
    aortitis myocarditis myokarditis endocarditis endokarditis infection infektion inflammation entzündung fever
    fieber fuo cup mgus mds mpn cushing hyperparathyroidism hyperparathyreoidismus goiter struma dementia demenz
    epilepsy epilepsie parkinsonism metastasiertes metastasierter metastasierte metastasized krebserkrankung
    prostatakrebs brustkrebs lungenkrebs hautkrebs darmkrebs tumorerkrankung disease erkrankung morbus syndrome
    syndrom malignom malignome malignancies mycosis fungoides burkitt kaposi control controls volunteer volunteers
    healthy kontrolle kontrollen nsclc sclc lymphadenitis
    """
)
_DETAILS = _words(
    """
    cell cells zell zelle zellig zelliges zelliger cellular cellules classical classic klassisches klassischer
    klassisch klassische nodular nodulär noduläres nodulärer noduläre sclerosis sclerosing sklerosierend
    sklerosierende sklerosierender sklerosierendes sklerose mixed cellularity gemischtzellig mischtyp lymphocyte
    lymphozyten predominant prädominant rich reich reiches depleted arm ns nos diffuse diffus diffuses diffuser large
    grosszellig grosszelliges großzelliges kleinzellig kleinzelliges kleinzelliger small follicular follikulär
    follikuläres mantle mantelzell mantelzelllymphom marginal zone marginalzonenlymphom peripheral peripher peripheres
    anaplastic anaplastisch anaplastisches angioimmunoblastic primary primär primäres mediastinal b t nk double hit
    triple burkitt kaposi merkel ewing castleman langerhans sézary high low grade hochgradig niedriggradig indolent
    aggressive aggressiv aggressives relapsed relapse refractory refraktär recurrent rezidivierend newly new diagnosed
    erstdiagnose ed initial initiales suspected verdacht v a auf z n zustand nach suspicion unknown unbekannt of the
    and und with mit in im des der die das de la le du della del di e y et von vom bei am an to status post stage
    stadium stade stadio estadio bulky poorly moderately well differentiated undifferenziert undifferentiated
    differenziertes invasive invasiv invasives ductal duktal duktales lobular lobulär lobuläres papillary papillär
    papilläres medullary medullär clear klarzellig renal urothelial transitional hepatocellular hepatozellulär
    squamous plattenepithel non nicht negative negativ positive positiv her er pr castration resistant
    kastrationsresistent hormone sensitive androgen control controls healthy volunteer volunteers gesund normal none
    kein keine advanced fortgeschritten fortgeschrittenes early limited limitiert extensive metastatic malignes
    malignem maligner malignant multiple multiples cutaneous kutan kutanes uveal mucosal acral acute akut chronic
    chronisch chronische lymphatic lymphatische lymphatisches lymphocytic lymphoblastic lymphoblastisch myeloid
    myeloische giant riesenzell soft tissue weichteil bone knochen germ keimzell keimzelltumor keimzelltumoren type
    typ typus grad unspecified stromal gastrointestinal gastrointestinaler gastroenteropancreatic oral extranodal
    intravascular transformed hairy hodenkrebs therapy induced second secondary sekundär local lokal lokales bilateral
    left right links rechts linken rechten linke rechte upper lower head neck kopf hals prostatic colorectal
    kolorektal kolorektales rectal esophageal gastric pancreatic hepatic thyroidal ovarian cervical endometrial
    bronchial pulmonary laryngeal pharyngeal tonsillar nasopharyngeal adrenal testicular vulvar anal intestinal
    cerebral hepatisch ossär lungen bronchus endometrium follow up nachsorge staging restaging gross groß pleural
    peritoneal cardiac lymph
    """
)
_ICD = r"[A-Z]\d{2}(?:\.\d{1,2})?(?!\d)|\d{4}/[0-3](?!\d)"
_TNM = r"[cpyra]{0,3}T[0-4xX][a-d]?|[cp]?N[0-3xX][a-c]?|[cp]?M[01xX][a-c]?|G[1-4]|R[0-2]"
_STAGE = r"[IV]{1,3}[ABCESX]{0,2}"
_TOKEN = re.compile(
    rf"(?<![^\W_])(?:{_ICD}|(?P<stage>{_STAGE})|(?:(?:{_TNM})[ ,]?)+)(?![^\W_])"
    r"|(?P<word>[^\W\d_]+)|(?P<number>\d+(?:[\W_]+\d+)*)"
)
_REST = "\0"


def known_diagnosis(text: str | None, secrets: frozenset[str] = frozenset()) -> tuple[str | None, bool]:
    """A diagnosis without the words of it that are not known as medical ones, and whether there were any; None where no
    disease is left.

    Codes of ICD and TNM and numbers up to 99 are kept.

    Args:
        secrets: words of the patient's names and numbers, see `shown.secrets_of`; these go though they are known.
    """
    if not text:
        return None, False
    diseases = 0

    def keep(match: re.Match) -> str:
        nonlocal diseases
        if folded(match[0]) & secrets:
            return _REST
        if match["number"]:
            return match[0] if len(match[0]) < 3 else _REST
        if match["word"]:
            forms = folded(match[0])
            parts = set(known_parts(match[0])) & (LESION | ORGANS | REGIONS | NUMBERED)
            disease = bool(forms & _DISEASES or parts & LESION)
            diseases += disease
            return match[0] if disease or forms & _DETAILS or (parts - ALSO_NAMES) else _REST
        diseases += not match["stage"]
        return match[0]

    kept = _TOKEN.sub(keep, text)
    changed = _REST in kept
    if changed:
        kept = re.sub(r"[^\w\0)]*\0(?:[^\w\0(]*\0)*[^\w(]*", " ", kept)
    kept = " ".join(re.sub(r"\(\s*\)|[<>=@|`\\\t]", " ", kept).split()).strip(" ,;:-/(&")
    kept = re.sub(r"(?i)(?:\s+(?:of|von|vom|de|del|di|du|the|der|des|in|im|bei|with|mit|and|und|et|y|e))+$", "", kept)
    return (kept or None) if diseases else None, changed or (not diseases and bool(kept))
